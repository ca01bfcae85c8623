"""Which causes a gain has: the difference between an arm and its baseline, split over what was done to the data.

A cause is something that an arm does to its data and its baseline does not: new captions, captions as found beside
them (mixing), each operator of its Data-Juicer recipe. The worth of a set of causes (a coalition) is the score of a
model trained on the data that these causes alone make, with the same seeds, settings and questions; the baseline is the
empty set, the arm the full one.

`captune explain RUN --arm ARM` writes below the run directory, as a run of its own:

    explain/ARM/causes-1-3/{dataset,adapter,predictions}   the coalition of causes 1 and 3
    explain/ARM/filters/causes-1-3.yaml                    the Data-Juicer recipe of its operators
    explain/ARM/recipe.yaml                                its arms are the coalitions that were trained
    explain/ARM/explanation.json                           the result (`explanation.explain` lists its keys)

Coalitions that are arms of the run, or whose data equal those of another, are not trained again.
"""
