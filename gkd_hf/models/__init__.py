"""The student: configuration, encoder adapter, decode heads. Self-contained: imports torch and transformers only."""
