"""The chaos suite: scripted faults against a cluster of real processes, under load that is verified."""
