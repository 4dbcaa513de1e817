"""What `petseg_utils` and the commands of the Makefile stand on: nobody has to read it to learn about segmentation."""
