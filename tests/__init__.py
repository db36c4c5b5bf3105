"""The tests; a package, so that one folder can use what another has: the S3 server, the program."""
