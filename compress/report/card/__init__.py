"""The model card: text, metadata, pictures, loading instructions."""
