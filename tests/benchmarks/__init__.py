"""How fast it is, as ratios measured in one run: `python -m tests.benchmarks`. Never collected by pytest.

`subjects` is what is measured, `measures` how, `sections` in which tables, `report` prints and writes them.
`function_pools` and `function_sections` are that for Python functions as jobs, some of which are measured `alone`.
"""
