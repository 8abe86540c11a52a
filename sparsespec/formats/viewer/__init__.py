"""The scripts and styles of the pages that show photographs with their masks."""
