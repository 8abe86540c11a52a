"""What the method made of one image, stage by stage: for figures, and for a page to explore."""
