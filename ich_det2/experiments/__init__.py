"""Experiments of many trainings: their cells, results, tables and figures."""
