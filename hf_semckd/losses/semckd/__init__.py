"""SemCKD (Chen et al., AAAI 2021; Wang et al., TKDE 2023)."""
