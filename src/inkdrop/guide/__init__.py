"""Guidance, thresholding and corrections: middleware round any sampler, found by name.

Each file states its PLACE in the one order in which they stand, from the sampler outwards to the net:

    10  bounds       clip, threshold     what the sampler is told is in the range of the data; one of them
    20  corrections  drift               the colours of what is guided
    30  gradients    classifier          a score is added to what the nets say
    40  mixing       autoguidance        the net against a weaker one
    50  mixing       cfg                 the net with its condition against the net without; nearest the net

and the parts of a bundle that it NEEDS besides the net. `plan.sampling` refuses another order, and two at one place.
Questions that are not about a denoiser (Ask.of = "decode") pass through all of them untouched.
"""
