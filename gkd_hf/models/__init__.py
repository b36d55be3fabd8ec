"""The student: configuration, encoder adapter, decode heads. Flat and self-contained: imports torch and transformers only."""
