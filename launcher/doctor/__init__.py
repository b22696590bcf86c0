"""Can this machine, and this cluster, train?"""
