"""Numbers to text: a board as markdown, CSV and SVG. Others call `board.write_board`, `speed` and `boundary`."""
