"""Rendezvous hashing: which members of a ring answer for a digest."""
