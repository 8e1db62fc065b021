"""Messages of the driver: parts of their text, and the streams that they are printed to."""
