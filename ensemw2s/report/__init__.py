"""What runs measured: records, statistics, pools, tables, figures, pages. No torch."""
