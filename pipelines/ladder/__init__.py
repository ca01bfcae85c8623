"""A recipe in small: the same comparison at a sixteenth, an eighth and a quarter of the rows, and what that says of the
whole (a "model ladder", Bhagia et al. 2024, arXiv:2412.04403).

`captune forecast RECIPE` writes below the recipe's run directory, as a run of its own:

    forecast/{ARM-16,ARM-8,ARM-4}/{dataset,adapter,predictions,likelihood}   an arm at a share of the rows
    forecast/recipe.yaml                                                     its arms are the rungs
    forecast/forecast.json                                                   the result
"""
