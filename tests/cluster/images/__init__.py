"""Real Apptainer and real images on a Debian 12 machine without an image registry."""
