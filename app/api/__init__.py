"""HTTP: routes, schemas and the one shape of errors.

Imports neither a framework nor a model: it validates, hands a job to the engine
and writes the answer.
"""
