# read: TEXT_LIMIT IMAGE_LIMIT PDF_LIMIT FIRST COUNT NOTE
# Answers: ok, the canonical path, the size, the stamp; then the bytes if they are within the limit, or else, if FIRST
# is given, COUNT lines (all, if it is empty) from that one on, cut one byte after the limit. Where there is a NOTE, what
# this is read for was done before: the stamp is "done", and the NOTE's words come in place of the bytes.
resolve "$@"
shift "$taken"
limit=$1 image=$2 pdf=$3 first=$4 count=$5 note=$6
if [ -n "$note" ] && [ -e "$note" ]; then
  say ok "$target" 0 done
  exec head -c 8192 <"$note"
fi
[ -e "$target" ] || absent
[ -f "$target" ] || fail irregular
[ -r "$target" ] || fail error 'permission denied'
text=1
case $target in
  *.[pP][nN][gG] | *.[jJ][pP][gG] | *.[jJ][pP][eE][gG] | *.[gG][iI][fF] | *.[wW][eE][bB][pP]) limit=$image text='' ;;
  *.[pP][dD][fF]) limit=$pdf text='' ;;
esac
measure "$target"
say ok "$target" "$size" "$stamp"
if [ "$size" -le "$limit" ]; then
  exec head -c "$limit" <"$target"
elif [ -n "$text" ] && [ -n "$first" ]; then
  tail -n "+$first" <"$target" | if [ -n "$count" ]; then head -n "$count"; else cat; fi | head -c "$((limit + 1))"
fi
