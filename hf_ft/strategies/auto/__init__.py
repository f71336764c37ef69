"""One strategy that chooses among the others, within a budget.

The config is in :mod:`~hf_ft.strategies.auto.config`, the strategies it may choose from in
:mod:`~hf_ft.strategies.auto.recipes`, what training costs in :mod:`~hf_ft.strategies.auto.budget`, the choice in
:mod:`~hf_ft.strategies.auto.choose`, and its result in :mod:`~hf_ft.strategies.auto.result`.
"""
