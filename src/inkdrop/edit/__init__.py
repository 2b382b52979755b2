"""Editing: middleware that holds on to what is known, combinators, cuts of the grid, and the way back to noise.

Nothing here asks which net, schedule or sampler it works with. The verbs on a model are in `inkdrop.editing`.
"""
