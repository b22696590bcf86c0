"""What a network is made of, and how signals travel through it.

In: a network, images.
Out: layers with costs, responses, propagation curves.
May import: models, models.catalog.
"""
