# links: NAME...
# Which of the symbolic links PATH/NAME... lead to somewhere inside PATH. Answers: ok; then for each of those its position
# from 0, and mode in hex and time of change of what it leads to (empty, if there is nothing).
resolve "$@"
shift "$taken"
say ok
top=$target position=0
for name; do
  canon "$top/$name"
  case ${err:-$real/} in
    "${top%/}"/*) say "$position" "$(stat -c '%f %y' -- "$real" 2>/dev/null)" ;;
  esac
  position=$((position + 1))
done
