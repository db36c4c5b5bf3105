"""A discrete-event network that drives the very `swarmpull.swarm` code that the roles run."""
