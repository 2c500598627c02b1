"""Process groups: launch settings, starting processes, and sharing work among them."""
