-- Bodies of a file, one a line, sent in turns; what came back is printed as one line of JSON.
-- With LOAD_DEADLINE each request says as its id when it was sent, and answers are judged by that.
local ffi = require('ffi')
ffi.cdef[[
typedef struct { long s; long ns; } time_spec;
int clock_gettime(int clock, time_spec *found);
]]
local spec = ffi.new('time_spec')
local deadline = 1000 * tonumber(os.getenv('LOAD_DEADLINE') or '0')
local mark = '@@@@@@@@@@@@@@@@@@'
local threads = {}
local requests = {}
local place = 0
local pause = tonumber(os.getenv('LOAD_PAUSE') or '0')

local function now()  -- milliseconds
  ffi.C.clock_gettime(1, spec)
  return 1e3 * tonumber(spec.s) + tonumber(spec.ns) / 1e6
end

function setup(thread)
  threads[1] = thread
end

function init(args)
  in_time, late, times = 0, 0, {}  -- of answers with status 200; milliseconds -> answers
  local headers = {['Content-Type'] = 'application/json'}
  for line in io.lines(os.getenv('LOAD_BODIES')) do
    if deadline > 0 then line = '{"id": "' .. mark .. '", ' .. line:sub(2) end
    requests[#requests + 1] = wrk.format('POST', nil, headers, line)
  end
end

function request()
  place = place % #requests + 1
  if deadline == 0 then return requests[place] end
  local said, from, to = requests[place], requests[place]:find(mark, 1, true)
  return said:sub(1, from - 1) .. string.format('%018.3f', now()) .. said:sub(to + 1)
end

if deadline > 0 then
  function response(status, headers, body)
    if status ~= 200 then return end
    local sent = tonumber(body:match('"id": *"([%d.]+)"'))
    local took = sent and now() - sent or 1e6
    if took <= deadline then in_time = in_time + 1 else late = late + 1 end
    took = math.ceil(took)
    times[took] = (times[took] or 0) + 1
  end
end

if pause > 0 then
  -- milliseconds before the next request of a connection, so that they do not come all at once
  function delay()
    return pause / 2 + math.random(pause)
  end
end

local function quantile(times, n, q)
  local sorted, seen = {}, 0
  for took in pairs(times) do sorted[#sorted + 1] = took end
  table.sort(sorted)
  for _, took in ipairs(sorted) do
    seen = seen + times[took]
    if seen >= q * n then return took / 1000 end
  end
  return 0
end

function done(summary, latency)
  local e = summary.errors
  local kept, passed = threads[1]:get('in_time'), threads[1]:get('late')
  io.write(string.format(
    '{"seconds": %.6f, "answers": %d, "refused": %d, "broken": %d, "p50": %.6f, "p99": %.6f, '
    .. '"in_time": %d, "accepted_p99": %.6f}\n',
    summary.duration / 1e6, summary.requests, e.status,
    e.connect + e.read + e.write + e.timeout,
    latency:percentile(50) / 1e6, latency:percentile(99) / 1e6,
    kept, quantile(threads[1]:get('times'), kept + passed, 0.99)))
end
