"""Peer-to-peer distribution of container images and other content-addressed blobs."""

__version__ = "0.1.0"
