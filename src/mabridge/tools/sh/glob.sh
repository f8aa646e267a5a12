# glob: PREFIX MIN MAX TOKEN BYTES NAME...
# Lists what is MIN to MAX (no limit, if empty) levels below PATH/PREFIX and called something like a NAME. Answers: ok, the
# canonical PATH; then for each entry TOKEN, its mode in hex, its time of change, and its path from PATH/PREFIX.
resolve "$@"
shift "$taken"
prefix=$1 min=$2 max=$3 token=$4 bytes=$5
shift 5
[ -e "$target" ] || absent
say ok "$target"
top=$target
canon "$top/$prefix"
case ${err:-$real/} in "${top%/}"/*) ;; *) exit 0 ;; esac
cd "$real" 2>/dev/null || exit 0

# walk DIR LEVEL: does what find does, for the images that have none.
walk() {
  set +f
  set -- "$1" "$2" "$1"/* "$1"/.[!.]* "$1"/..?*
  set -f
  level=$2
  shift 2
  for entry; do
    shift
    if [ -e "$entry" ] || [ -L "$entry" ]; then set -- "$@" "$entry"; fi
  done
  [ "$#" -gt 0 ] || return 0
  if [ "$level" -ge "$min" ]; then stat -c "$token %f %y %n" -- "$@"; fi
  if [ -n "$max" ] && [ "$level" -ge "$max" ]; then return 0; fi
  for entry; do
    if [ -d "$entry" ] && [ ! -L "$entry" ]; then (walk "$entry" "$((level + 1))"); fi
  done
}

{
  if command -v find >/dev/null; then
    for name; do
      set -- "$@" -o -name "$name"
      shift
    done
    shift
    find . -mindepth "$min" ${max:+-maxdepth "$max"} \( "$@" \) -exec stat -c "$token %f %y %n" -- {} +
  else
    if [ "$min" -eq 0 ]; then stat -c "$token %f %y %n" -- .; fi
    walk . 1
  fi
} 2>/dev/null | head -c "$bytes"
