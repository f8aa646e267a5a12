"""Many sessions in one worker, with faults and restarts throughout: none is lost, repeated, silent or left behind."""
