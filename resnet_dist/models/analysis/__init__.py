"""What a network is made of, and how signals travel through it.

In: a network, images.
Out: layers with their costs, responses.
May import: models, models.catalog.
"""
