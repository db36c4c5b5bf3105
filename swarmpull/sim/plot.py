"""stub"""

from swarmpull.sim.options import SimulationOptions


def draw(options, results):
    return ""
