"""Results for people to look at: tables, figures and the HTML report."""
