"""The OCI distribution HTTP API, and generic blobs over HTTP, in front of a `RegistryService`."""
