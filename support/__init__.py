"""What `petseg_utils` stands on; nobody has to read it to learn about segmentation."""
