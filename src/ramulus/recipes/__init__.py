"""Recipes: each module builds one frozen Run, or the stages of one; `ramulus train NAME` runs it."""
