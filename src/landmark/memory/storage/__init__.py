"""Where keys and values live: on the device, in host memory or on disk. It speaks blocks."""
