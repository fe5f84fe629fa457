-- Bodies of a file, one a line, sent in turns; what came back is printed as one line of JSON
local requests = {}
local place = 0
local pause = tonumber(os.getenv('LOAD_PAUSE') or '0')

function init(args)
  local headers = {['Content-Type'] = 'application/json'}
  for line in io.lines(os.getenv('LOAD_BODIES')) do
    requests[#requests + 1] = wrk.format('POST', nil, headers, line)
  end
end

function request()
  place = place % #requests + 1
  return requests[place]
end

if pause > 0 then
  -- milliseconds before the next request of a connection, so that they do not come all at once
  function delay()
    return pause / 2 + math.random(pause)
  end
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format(
    '{"seconds": %.6f, "answers": %d, "refused": %d, "broken": %d, "p50": %.6f, "p99": %.6f}\n',
    summary.duration / 1e6, summary.requests, e.status,
    e.connect + e.read + e.write + e.timeout,
    latency:percentile(50) / 1e6, latency:percentile(99) / 1e6))
end
