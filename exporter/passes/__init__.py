"""Graph passes, one a file; their order is in `rankbook.exporter.export`."""
