// Where two texts differ: runs of words that are the same or not.

const WORDS = /\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu;
const MOST = 700; // words a side that are compared one with another

// [[text, same]] of `mine` against `other`, by the longest common sequence of words; beyond MOST words only the shared
// start and end count.
export function differences(mine, other) {
  const [a, b] = [mine.match(WORDS) ?? [], other.match(WORDS) ?? []];
  const same = new Array(a.length).fill(false);
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) same[start++] = true;
  let [endA, endB] = [a.length, b.length];
  while (endA > start && endB > start && a[endA - 1] === b[endB - 1]) {
    same[--endA] = true;
    endB--;
  }
  if (endA - start <= MOST && endB - start <= MOST) markCommon(a, b, start, endA, endB, same);
  const runs = [];
  a.forEach((word, at) => {
    if (runs.length && runs.at(-1)[1] === same[at]) runs.at(-1)[0] += word;
    else runs.push([word, same[at]]);
  });
  return runs;
}

function markCommon(a, b, start, endA, endB, same) {
  const [rows, columns] = [endA - start, endB - start];
  const table = new Uint16Array((rows + 1) * (columns + 1));
  const place = (row, column) => row * (columns + 1) + column;
  for (let row = rows - 1; row >= 0; row--) {
    for (let column = columns - 1; column >= 0; column--) {
      table[place(row, column)] =
        a[start + row] === b[start + column]
          ? table[place(row + 1, column + 1)] + 1
          : Math.max(table[place(row + 1, column)], table[place(row, column + 1)]);
    }
  }
  let [row, column] = [0, 0];
  while (row < rows && column < columns) {
    if (a[start + row] === b[start + column]) {
      same[start + row] = true;
      row++;
      column++;
    } else if (table[place(row + 1, column)] >= table[place(row, column + 1)]) row++;
    else column++;
  }
}
