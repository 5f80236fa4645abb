"""Recipes: each module builds one frozen Run, or the stages of one; `ramify train NAME` runs it."""
