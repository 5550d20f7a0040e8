"""Engines over tiny models: placements, and whether nothing is left behind."""

from policies.placement import TIERS

RESIDENT, STREAMED = (100, 0, 100, 0, 100, 0), (20, 30, 30, 40, 50, 0)


def is_clean(llm):
    """Nobody waits or runs, and every page, tail, projection and reserved place is given back."""
    engine = llm.engine
    free = all(engine.cache.free(t) == engine.cache.total(t) for t in TIERS)
    none_projected = all(engine.scheduler.admission.projected_peak(t) == 0 for t in TIERS)
    counted = all(engine.scheduler.admission.free(t) == engine.cache.total(t) for t in TIERS)
    none_reserved = engine.scheduler.rows_waiting == engine.scheduler.admission.prefixes.reserved_places == 0
    all_tails = engine.cache.free_tails == engine.cache.tails
    return engine.unfinished == 0 and free and counted and none_projected and none_reserved and all_tails
