"""What the frozen original model says: as a live reference, or asked once and kept beside the corpus."""
