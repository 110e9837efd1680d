"""What runs measured: arms, statistics, pools, tables, figures, pages. No torch."""
