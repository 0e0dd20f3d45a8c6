"""The entropy coder of all codecs: whole numbers in classes to bytes and back."""
