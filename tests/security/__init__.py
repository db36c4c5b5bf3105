"""Mutual TLS between roles, server certificates, and passwords."""
