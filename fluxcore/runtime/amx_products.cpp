// Matrix products in the tiles of AMX, rows of activations times packed weights; and attention,
// which is two of them.
//
// Owns the layout of packed weights and the order in which tiles are multiplied. Owns no memory:
// whoever calls hands in every buffer. What is asked for ahead may lie past a buffer's end; it is
// not read. Compiled, checked and called by amx_products.py.
//
// One step multiplies 64 bytes of each row: 32 numbers in bf16, 64 in int8. A panel is 32 rows of
// activations, or of weights, which are columns of the result: two tiles a step. Tiles lie in
// memory in the order in which they are read:
//   rows     [block of panels][slice][panel][step][2 tiles][16 rows][64 bytes]
//   weights  [group of panels][slice][panel][step][2 tiles][64 bytes / 4][16 columns][4 bytes]
// A slice is as many steps as let a panel of weights stay in the first cache while a block of rows
// passes by. Between slices the sums wait in a buffer that stays in the second cache, since the
// registers hold four tiles of them beside what is being multiplied.
//
// Source: Intel 64 and IA-32 Architectures Optimization Reference Manual, the chapter on AMX: two
// by two tiles of sums, weights in groups of four bytes, prefetching between the products.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <type_traits>

namespace {

constexpr long TILE = 1024;  // bytes
constexpr long STEP = 2 * TILE;
constexpr long PANEL = 32;  // rows
constexpr long SLICE = 8;   // steps: 16 KB of a panel of weights, and of rows; the cache has 48
constexpr long GROUP = 8;   // panels of weights for which a slice of rows is read once
constexpr long AHEAD = 2;   // steps by which rows are asked for before they are multiplied
constexpr long LINE = 64;   // bytes

struct Bf16 {
  static constexpr long NUMBERS = 32;  // of a row in a step
  using Number = uint16_t;
};
struct Int8 {
  static constexpr long NUMBERS = 64;
  using Number = int8_t;
};

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14]{};
  uint16_t row_bytes[16]{};
  uint8_t rows[16]{};
};

void take_tiles() {
  TileShapes shapes;
  for (int tile = 0; tile < 8; tile++) {
    shapes.row_bytes[tile] = 64;
    shapes.rows[tile] = 16;
  }
  asm volatile("" : : "m"(shapes));
  _tile_loadconfig(&shapes);
}

long panels_of(long rows) { return (rows + PANEL - 1) / PANEL; }

// Bytes before a step of a panel, where panels lie in blocks and steps in slices.
long place(long panel, long step, long panels, long steps, long block) {
  const long first = panel / block * block, slice = step / SLICE * SLICE;
  const long in_block = std::min(block, panels - first);
  const long in_slice = std::min(SLICE, steps - slice);
  return (first * steps + slice * in_block + (panel - first) * in_slice + step - slice) * STEP;
}

// 32 rows times 32 columns over one slice, added to what the sums hold unless it is the first.
template <class Kind>
void multiply(const char* rows, const char* weights, float* sums, long steps, bool is_first) {
  asm volatile("" ::: "memory");  // all that was written before is read by the tiles
#define MULTIPLY(sum, row, column)                \
  if constexpr (std::is_same_v<Kind, Bf16>)       \
    _tile_dpbf16ps(sum, row, column);             \
  else                                            \
    _tile_dpbssd(sum, row, column)
#define ASK(quarter)                                      \
  for (long line = quarter * 8; line < quarter * 8 + 8; line++) \
  _mm_prefetch(rows + AHEAD * STEP + line * LINE, _MM_HINT_T0)
  if (is_first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(2, sums + 512, 64);
    _tile_loadd(3, sums + 768, 64);
  }
  for (long step = 0; step < steps; step++) {
    _tile_loadd(4, rows, 64);
    _tile_loadd(6, weights, 64);
    MULTIPLY(0, 4, 6);
    ASK(0);
    _tile_loadd(7, weights + TILE, 64);
    ASK(1);
    MULTIPLY(1, 4, 7);
    ASK(2);
    _tile_loadd(5, rows + TILE, 64);
    MULTIPLY(2, 5, 6);
    ASK(3);
    for (long line = 0; line < LINE / SLICE; line++)  // the next sums
      _mm_prefetch((const char*)(sums + 1024) + (step * LINE / SLICE + line) * LINE, _MM_HINT_T0);
    MULTIPLY(3, 5, 7);
    rows += STEP;
    weights += STEP;
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
#undef ASK
#undef MULTIPLY
}

// The largest magnitude of a row of bf16.
float largest_of(const uint16_t* row, long inner) {
  __m512i largest = _mm512_setzero_si512();
  const __m512i no_sign = _mm512_set1_epi16(0x7fff);
  for (long k = 0; k < inner; k += 32)
    largest = _mm512_max_epu16(largest, _mm512_and_si512(_mm512_loadu_si512(row + k), no_sign));
  alignas(64) uint16_t each[32];
  _mm512_store_si512(each, largest);
  const uint32_t bits = uint32_t(*std::max_element(each, each + 32)) << 16;
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits)));
}

__m512 widened(const uint16_t* numbers) {
  const __m256i narrow = _mm256_loadu_si256((const __m256i*)numbers);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

// 64 bytes of a row as the tiles take them; int8 is rounded here.
__m512i taken(Bf16, const uint16_t* row, float) { return _mm512_loadu_si512(row); }
__m512i taken(Int8, const uint16_t* row, float factor) {
  __m512i bytes = _mm512_setzero_si512();
  const __m512 by = _mm512_set1_ps(factor);
#define QUARTER(i)                                                                     \
  bytes = _mm512_inserti32x4(                                                          \
      bytes, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(widened(row + 16 * i), by))), i)
  QUARTER(0);
  QUARTER(1);
  QUARTER(2);
  QUARTER(3);
#undef QUARTER
  return bytes;
}

// One panel of rows, brought into the order of the tiles; rows past the last are zero.
template <class Kind>
void lay_out(const uint16_t* x, long stride, long panel, long rows, long inner, long block,
             char* to, float* scales) {
  const long steps = inner / Kind::NUMBERS, panels = panels_of(rows);
  for (long within = 0; within < PANEL; within++) {
    const long row = panel * PANEL + within;
    const uint16_t* from = x + row * stride;
    float scale = 1;
    if (scales != nullptr && row < rows) {
      scale = std::max(largest_of(from, inner), 1e-12f) / 127;
      scales[row] = scale;
    }
    const float factor = 1 / scale;
    for (long step = 0; step < steps; step++) {
      char* line = to + place(panel, step, panels, steps, block) + within * LINE;
      _mm512_store_si512(line, row < rows ? taken(Kind(), from + step * Kind::NUMBERS, factor)
                                          : _mm512_setzero_si512());
    }
  }
}

// Sums to bf16; in int8 they are whole numbers, to be scaled by row and column.
__m512bh finished(Bf16, const float* sums, float, const float*) {
  return _mm512_cvtne2ps_pbh(_mm512_load_ps(sums + 256), _mm512_load_ps(sums));
}
__m512bh finished(Int8, const float* sums, float scale, const float* of_columns) {
  const __m512 of_row = _mm512_set1_ps(scale);
  const auto half = [&](const float* part, const float* of_half) {
    const __m512 whole = _mm512_cvtepi32_ps(_mm512_load_si512(part));
    return _mm512_mul_ps(_mm512_mul_ps(whole, of_row), _mm512_loadu_ps(of_half));
  };
  return _mm512_cvtne2ps_pbh(half(sums + 256, of_columns + 16), half(sums, of_columns));
}

template <class Kind>
void product(const uint16_t* x, long stride, const char* weights, const float* weight_scales,
             uint16_t* out, long rows, long inner, long columns, long block, char* laid_out,
             float* scales, float* sums, int threads) {
  const long steps = inner / Kind::NUMBERS;
  const long panels = panels_of(rows), weight_panels = columns / PANEL;
  const long blocks = (panels + block - 1) / block;
  const long groups = (weight_panels + GROUP - 1) / GROUP;
  std::atomic<long> next_panel{0}, next_task{0};
  std::atomic<int> next_thread{0};
#pragma omp parallel num_threads(threads)
  {
    for (long panel; (panel = next_panel++) < panels;)
      lay_out<Kind>(x, stride, panel, rows, inner, block, laid_out, scales);
#pragma omp barrier
    float* mine = sums + next_thread++ * block * GROUP * PANEL * PANEL;
    take_tiles();
    // All blocks of rows of one group of weights follow each other, while its weights are near.
    for (long task; (task = next_task++) < groups * blocks;) {
      const long from_panel = task % blocks * block;
      const long to_panel = std::min(from_panel + block, panels);
      const long from_group = task / blocks * GROUP;
      const long to_group = std::min(from_group + GROUP, weight_panels);
      const long height = to_panel - from_panel;
      for (long slice = 0; slice < steps; slice += SLICE) {
        const long deep = std::min(SLICE, steps - slice);
        const char* of_rows = laid_out + place(from_panel, slice, panels, steps, block);
        const char* of_weights = weights + place(from_group, slice, weight_panels, steps, GROUP);
        for (long column = 0; column < to_group - from_group; column++) {
          const char* panel = of_weights + column * deep * STEP;
          const long share = (deep * STEP / LINE + height - 1) / height;
          for (long row = 0; row < height; row++) {
            for (long line = row * share; line < (row + 1) * share; line++)  // the next panel
              _mm_prefetch(panel + deep * STEP + line * LINE, _MM_HINT_T1);
            multiply<Kind>(of_rows + row * deep * STEP, panel,
                           mine + (column * block + row) * PANEL * PANEL, deep, slice == 0);
          }
        }
      }
      for (long row = from_panel * PANEL; row < std::min(to_panel * PANEL, rows); row++) {
        const long within = row % PANEL;
        for (long column = from_group; column < to_group; column++) {
          const long tile = (column - from_group) * block + row / PANEL - from_panel;
          const float* line = mine + tile * PANEL * PANEL + within / 16 * 512 + within % 16 * 16;
          const __m512bh done = finished(Kind(), line, scales == nullptr ? 1 : scales[row],
                                         weight_scales + column * PANEL);
          _mm512_storeu_si512(out + row * columns + column * PANEL, (__m512i)done);
        }
      }
    }
    _tile_release();
  }
}

template <class Kind>
void pack(const typename Kind::Number* weights, char* to, long columns, long inner, int threads) {
  constexpr long IN_FOUR_BYTES = 4 / sizeof(typename Kind::Number);
  const long steps = inner / Kind::NUMBERS, panels = columns / PANEL;
#pragma omp parallel for num_threads(threads)
  for (long panel = 0; panel < panels; panel++)
    for (long step = 0; step < steps; step++) {
      auto* tiles = (uint32_t*)(to + place(panel, step, panels, steps, GROUP));
      for (long column = 0; column < PANEL; column++) {
        const auto* row = weights + (panel * PANEL + column) * inner + step * Kind::NUMBERS;
        for (long four = 0; four < 16; four++)
          tiles[column / 16 * 256 + four * 16 + column % 16] =
              *(const uint32_t*)(row + four * IN_FOUR_BYTES);
      }
    }
}

// 2 to the power of x, for x of at most 0, to 3e-6, and never less than the least normal number.
// The polynomial is that of exp(x log 2), cut off.
__m512 power_of_two(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);  // in this order what is no number stays none
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);  // -0.5 to 0.5
  __m512 sum = _mm512_set1_ps(1.3333558e-3f);
  for (float factor : {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
    sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(factor));
  return _mm512_scalef_ps(sum, whole);
}

// A matrix whose rows lie apart.
struct Rows {
  const uint16_t* first;
  long stride;  // in numbers
  const uint16_t* operator[](long row) const { return first + row * stride; }
};

// Keys [tokens, width] as weights whose columns are the keys; what is missing to a panel is zero.
void pack_keys(Rows keys, long tokens, long width, uint32_t* to) {
  for (long panel = 0; panel < panels_of(tokens); panel++)
    for (long step = 0; step < width / Bf16::NUMBERS; step++, to += STEP / 4)
      for (long column = 0; column < PANEL; column++) {
        const long key = panel * PANEL + column;
        const auto* row = (const uint32_t*)(keys[key < tokens ? key : 0] + step * Bf16::NUMBERS);
        for (long pair = 0; pair < 16; pair++)
          to[column / 16 * 256 + pair * 16 + column % 16] = key < tokens ? row[pair] : 0;
      }
}

// Values [tokens, width] as weights whose columns are the width, one panel of 32 after the other.
void pack_values(Rows values, long tokens, long width, uint32_t* to) {
  for (long panel = 0; panel < width / PANEL; panel++)
    for (long step = 0; step < panels_of(tokens); step++, to += STEP / 4)
      for (long pair = 0; pair < 16; pair++)
        for (long half = 0; half < 2; half++) {
          const long token = step * PANEL + 2 * pair, column = panel * PANEL + 16 * half;
          const auto take = [&](long row) {
            if (row >= tokens) return _mm512_setzero_si512();
            const auto* from = (const __m256i*)(values[row] + column);
            return _mm512_cvtepu16_epi32(_mm256_loadu_si256(from));
          };
          const __m512i both = _mm512_or_si512(take(token), _mm512_slli_epi32(take(token + 1), 16));
          _mm512_store_si512(to + half * 256 + pair * 16, both);
        }
}

// Scores of 32 queries, as tiles of one panel of keys after the other, to weights in bf16, as the
// rows of a product, and the sum of each query's.
void soften(float* scores, long tokens, float factor, char* weights, float* sums) {
  const long panels = panels_of(tokens);
  for (long key = tokens; key < panels * PANEL; key++)  // of no key
    for (long query = 0; query < PANEL; query++)
      scores[key / PANEL * PANEL * PANEL + key % PANEL / 16 * 256 + query / 16 * 512 +
             query % 16 * 16 + key % 16] = -INFINITY;
  const __m512 by = _mm512_set1_ps(factor);
  for (long query = 0; query < PANEL; query++) {
    const float* line = scores + query / 16 * 512 + query % 16 * 16;
    __m512 most[2] = {_mm512_load_ps(line), _mm512_load_ps(line + 256)};
    for (long panel = 1; panel < panels; panel++)
      for (long half = 0; half < 2; half++)
        most[half] = _mm512_max_ps(
            most[half], _mm512_load_ps(line + panel * PANEL * PANEL + half * 256));
    const float largest = _mm512_reduce_max_ps(_mm512_max_ps(most[0], most[1]));
    const __m512 less = _mm512_set1_ps(largest * factor);
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (long panel = 0; panel < panels; panel++) {
      __m512 part[2];
      for (long half = 0; half < 2; half++) {
        const __m512 score = _mm512_load_ps(line + panel * PANEL * PANEL + half * 256);
        part[half] = power_of_two(_mm512_fmsub_ps(score, by, less));
        sum[half] = _mm512_add_ps(sum[half], part[half]);
      }
      _mm512_store_si512(weights + panel * STEP + query * LINE,
                         (__m512i)_mm512_cvtne2ps_pbh(part[1], part[0]));
    }
    sums[query] = _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
  }
}

struct Heads {
  const uint16_t* first;
  long head, row;  // strides, in numbers
  Rows operator[](long index) const { return {first + index * head, row}; }
};

void attend(Heads q, Heads k, Heads v, Heads out, long heads, long queries, long tokens, long width,
            char* buffers, long buffer, int threads) {
  const long steps = width / Bf16::NUMBERS, key_panels = panels_of(tokens);
  const long parts = std::max(1L, std::min(panels_of(queries), (2 * threads + heads - 1) / heads));
  const long part = (panels_of(queries) + parts - 1) / parts;
  std::atomic<long> next_task{0};
  std::atomic<int> next_thread{0};
  const float factor = 1.44269504f / std::sqrt(float(width));  // log2(e): powers of two are taken
#pragma omp parallel num_threads(threads)
  {
    char* mine = buffers + next_thread++ * buffer;
    char* keys = mine;
    char* values = keys + key_panels * steps * STEP;
    char* rows = values + key_panels * steps * STEP;
    char* weights = rows + steps * STEP;
    float* scores = (float*)(weights + key_panels * STEP);
    float* sums = scores + key_panels * PANEL * PANEL;
    float* finished = sums + PANEL;
    take_tiles();
    long packed = -1;
    for (long task; (task = next_task++) < heads * parts;) {
      const long head = task / parts;
      if (packed != head) {
        pack_keys(k[head], tokens, width, (uint32_t*)keys);
        pack_values(v[head], tokens, width, (uint32_t*)values);
        packed = head;
      }
      const long end = std::min((task % parts + 1) * part, panels_of(queries));
      for (long panel = task % parts * part; panel < end; panel++) {
        const long count = std::min(PANEL, queries - panel * PANEL);
        const Rows asked = q[head];
        lay_out<Bf16>(asked[panel * PANEL], asked.stride, 0, count, width, 1, rows, nullptr);
        for (long key = 0; key < key_panels; key++)
          multiply<Bf16>(rows, keys + key * steps * STEP, scores + key * PANEL * PANEL, steps,
                         true);
        soften(scores, tokens, factor, weights, sums);
        for (long column = 0; column < width / PANEL; column++) {
          multiply<Bf16>(weights, values + column * key_panels * STEP, finished, key_panels, true);
          for (long query = 0; query < count; query++) {
            const float* line = finished + query / 16 * 512 + query % 16 * 16;
            const __m512 by = _mm512_set1_ps(1 / sums[query]);
            const __m512bh done = _mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_load_ps(line + 256), by),
                                                      _mm512_mul_ps(_mm512_load_ps(line), by));
            auto* to = (uint16_t*)out[head][panel * PANEL + query] + column * PANEL;
            _mm512_storeu_si512(to, (__m512i)done);
          }
        }
      }
    }
    _tile_release();
  }
}

}  // namespace

extern "C" {

// Weights [columns, inner], in the order of the tiles. Columns are a multiple of 32, inner of 64.
void fluxd_pack_bf16(const uint16_t* weights, char* to, long columns, long inner, int threads) {
  pack<Bf16>(weights, to, columns, inner, threads);
}
void fluxd_pack_int8(const int8_t* weights, char* to, long columns, long inner, int threads) {
  pack<Int8>(weights, to, columns, inner, threads);
}

// x [rows, inner] bf16, with a stride in numbers, times packed weights -> out [rows, columns] bf16.
// Buffers, aligned to 64 bytes: laid_out, rows rounded up to 32 times a row of the kind; sums,
// 32 KB times block a thread; scales, in int8, one float a row. A block is a number of panels.
void fluxd_product_bf16(const uint16_t* x, long stride, const char* weights, uint16_t* out,
                        long rows, long inner, long columns, long block, char* laid_out,
                        float* sums, int threads) {
  product<Bf16>(x, stride, weights, nullptr, out, rows, inner, columns, block, laid_out, nullptr,
                sums, threads);
}
void fluxd_product_int8(const uint16_t* x, long stride, const char* weights,
                        const float* weight_scales, uint16_t* out, long rows, long inner,
                        long columns, long block, char* laid_out, float* scales, float* sums,
                        int threads) {
  product<Int8>(x, stride, weights, weight_scales, out, rows, inner, columns, block, laid_out,
                scales, sums, threads);
}

// softmax(q k / sqrt(width)) v. Strides are in numbers, of a head and of a row. A thread's buffer
// is what ``fluxd_attention_bytes`` says, aligned to 64 bytes.
long fluxd_attention_bytes(long tokens, long width) {
  const long panels = panels_of(tokens), steps = width / Bf16::NUMBERS;
  return (2 * panels * steps + steps + panels) * STEP + (panels * PANEL + 1 + PANEL) * PANEL * 4;
}
void fluxd_attention(const uint16_t* q, long q_head, long q_row, const uint16_t* k, long k_head,
                     long k_row, const uint16_t* v, long v_head, long v_row, uint16_t* out,
                     long out_head, long out_row, long heads, long queries, long tokens, long width,
                     char* buffers, int threads) {
  attend({q, q_head, q_row}, {k, k_head, k_row}, {v, v_head, v_row}, {out, out_head, out_row},
         heads, queries, tokens, width, buffers, fluxd_attention_bytes(tokens, width), threads);
}
}
