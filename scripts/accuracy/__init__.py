"""How accurate students get under different distillation methods: runs, statistics and tables, one file a subject."""
