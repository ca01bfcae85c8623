"""How the shipped sample models were trained: `python -m pipelines.sample.training.blip2` and `... .mgm`; results in
README.md here.
"""
