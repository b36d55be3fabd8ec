"""Data: domains and label maps, exactly resumable streams, augmentations, and the toy city."""
