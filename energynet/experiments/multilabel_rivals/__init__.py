"""The rivals of multi-label classification, one small file each, written from the papers."""
