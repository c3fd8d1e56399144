"""Record files to normalized batches on the device, in an exactly known order."""
