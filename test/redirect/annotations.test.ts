import test from 'ava';
import {InputError} from '../../src/errors.js';
import {ambientCapture, decideEnrolment, sidecarCapture, ISTIO_DEFAULTS, type NodeDefaults, type PodMetadata} from '../../src/redirect/annotations.js';
import type {Capture} from '../../src/redirect/capture.js';

const AMBIENT = {'istio.io/dataplane-mode': 'ambient'};
const NONE = {'istio.io/dataplane-mode': 'none'};
const SIDECAR = {'sidecar.istio.io/status': '{"containers":["istio-proxy"]}'};
const TRAFFIC = 'traffic.sidecar.istio.io/';

function pod(extra: Partial<PodMetadata> = {}): PodMetadata {
	return {name: 'shop/web', labels: {}, annotations: {}, namespaceLabels: {}, ...extra};
}

const ambient = (annotations: Record<string, string> = {}, defaults: Partial<NodeDefaults> = {}) => ambientCapture(pod({annotations}), {...ISTIO_DEFAULTS, ...defaults});
const sidecar = (annotations: Record<string, string> = {}, defaults: Partial<NodeDefaults> = {}) => sidecarCapture(pod({annotations}), {...ISTIO_DEFAULTS, ...defaults});

/* Who is enrolled. */

const enrolled = test.macro({
	exec(t, extra: Partial<PodMetadata>, mode: Capture['mode'], warnings: readonly string[] = []) {
		const decision = decideEnrolment(pod(extra), ISTIO_DEFAULTS);
		t.true(decision.enrol);
		t.is(decision.enrol && decision.capture.mode, mode);
		t.deepEqual(decision.enrol && decision.warnings, warnings);
	},
	title: (title = '') => `enrolled: ${title}`,
});
const leftAlone = test.macro({
	exec(t, extra: Partial<PodMetadata>, why: string) {
		t.deepEqual(decideEnrolment(pod(extra), ISTIO_DEFAULTS), {enrol: false, why});
	},
	title: (title = '') => `left alone: ${title}`,
});

test('the pod\'s label', enrolled, {labels: AMBIENT}, 'ambient');
test('the namespace\'s label', enrolled, {namespaceLabels: AMBIENT}, 'ambient');
test('the pod\'s label, against the namespace\'s', enrolled, {labels: AMBIENT, namespaceLabels: NONE}, 'ambient');
test('a running pod', enrolled, {labels: AMBIENT, phase: 'Running', hostNetwork: false, namespaceExcluded: false}, 'ambient');
test('a pod label of another value, which is told', enrolled, {labels: {'istio.io/dataplane-mode': 'off'}, namespaceLabels: AMBIENT}, 'ambient',
	['label istio.io/dataplane-mode is "off", which is neither ambient nor none: the namespace\'s counts']);
test('a sidecar', enrolled, {annotations: SIDECAR}, 'sidecar');
test('a sidecar in an ambient namespace', enrolled, {annotations: SIDECAR, labels: AMBIENT, namespaceLabels: AMBIENT}, 'sidecar');
test('a sidecar whose status is empty', enrolled, {annotations: {'sidecar.istio.io/status': ''}}, 'sidecar');
test('an application that calls itself ztunnel, elsewhere', enrolled, {labels: {...AMBIENT, app: 'ztunnel'}}, 'ambient');
test('another application in ztunnel\'s namespace', enrolled, {name: 'istio-system/web', labels: AMBIENT}, 'ambient');

test('no label', leftAlone, {}, 'it has no sidecar, and neither it nor its namespace has the label istio.io/dataplane-mode=ambient');
test('a namespace label of another value', leftAlone, {namespaceLabels: {'istio.io/dataplane-mode': 'Ambient'}}, 'it has no sidecar, and neither it nor its namespace has the label istio.io/dataplane-mode=ambient');
test('the pod\'s label is none', leftAlone, {labels: NONE, namespaceLabels: AMBIENT}, 'its label istio.io/dataplane-mode is "none"');
test('a pod label with a slip', leftAlone, {labels: {'istio.io/dataplane-mode': 'ambiant'}}, 'its label istio.io/dataplane-mode is "ambiant"');
test('the node\'s network', leftAlone, {labels: AMBIENT, hostNetwork: true}, 'it has the node\'s network namespace (hostNetwork)');
test('the node\'s network, with a sidecar', leftAlone, {annotations: SIDECAR, hostNetwork: true}, 'it has the node\'s network namespace (hostNetwork)');
test('ended well', leftAlone, {labels: AMBIENT, phase: 'Succeeded'}, 'it has ended (phase Succeeded)');
test('ended badly', leftAlone, {annotations: SIDECAR, phase: 'Failed'}, 'it has ended (phase Failed)');
test('an excluded namespace', leftAlone, {labels: AMBIENT, namespaceExcluded: true}, 'its namespace is excluded on this node');
test('ztunnel itself', leftAlone, {name: 'istio-system/ztunnel-x', labels: {app: 'ztunnel'}, namespaceLabels: AMBIENT}, 'it is ztunnel');
test('a sidecar that asks for no interception', leftAlone, {annotations: {...SIDECAR, 'sidecar.istio.io/interceptionMode': 'NONE'}}, 'annotation sidecar.istio.io/interceptionMode is NONE');

test('what has no effect is told', enrolled, {
	labels: AMBIENT, annotations: {[`${TRAFFIC}excludeOutboundPorts`]: '80', 'ambient.istio.io/redirection': 'enabled', 'ambient.istio.io/of-tomorrow': 'x', 'example.org/else': 'x'},
}, 'ambient', [`annotation ${TRAFFIC}excludeOutboundPorts has no effect in ambient mode`, 'annotation ambient.istio.io/of-tomorrow is not known and has no effect']);
test('what has no effect on a sidecar is told', enrolled, {
	annotations: {
		...SIDECAR, 'ambient.istio.io/redirection': 'enabled', 'ambient.istio.io/dns-capture': 'true', [`${TRAFFIC}ofTomorrow`]: 'x',
		[`${TRAFFIC}includeInboundPorts`]: '80,81', [`${TRAFFIC}excludeInboundPorts`]: '81, 82',
	},
}, 'sidecar', [
	'annotation ambient.istio.io/dns-capture has no effect in sidecar mode', `annotation ${TRAFFIC}ofTomorrow is not known and has no effect`,
	`annotation ${TRAFFIC}excludeInboundPorts has no effect on port 81, which includeInboundPorts lists`,
]);

/* What is captured. */

test('ambient, without annotations', t => {
	t.deepEqual(ambient(), {
		mode: 'ambient',
		exempt: {marks: [{value: 0x539, mask: 0xfff}, {value: 0x111, mask: 0xfff}], uids: [], gids: [], cgroups: []},
		outbound: {port: 15_001, excludePorts: [], includePorts: [], excludeRanges: [], includeRanges: '*'},
		inbound: {port: 15_006, includePorts: '*', excludePorts: [15_008], passNode: true},
		dns: {port: 15_053},
		keepSource: true,
		excludeInterfaces: [],
	});
});

test('a sidecar, without annotations', t => {
	t.deepEqual(sidecar({}, {sidecarUid: 2000, sidecarGid: 2001}), {
		mode: 'sidecar',
		exempt: {marks: [], uids: [], gids: [], cgroups: []},
		outbound: {port: 15_001, excludePorts: [], includePorts: [], excludeRanges: [], includeRanges: '*'},
		inbound: {port: 15_006, includePorts: '*', excludePorts: [15_008, 15_020, 15_021, 15_090], passNode: false},
		keepSource: false,
		excludeInterfaces: [],
		proxy: {uid: 2000, gid: 2001},
	});
});

const read = test.macro({
	exec(t, capture: Capture, at: (capture: Capture) => unknown, expected: unknown) {
		t.deepEqual(at(capture), expected);
	},
	title: (title = '') => `read: ${title}`,
});
const dnsOf = ({dns}: Capture) => dns;
const inboundOf = ({inbound}: Capture) => inbound;
const includeRanges = ({outbound}: Capture) => outbound.includeRanges;
const excludeRanges = ({outbound}: Capture) => outbound.excludeRanges;
const includePorts = ({outbound}: Capture) => outbound.includePorts;
const excludePorts = ({outbound}: Capture) => outbound.excludePorts;

test('bypass-inbound-capture leaves inbound out', read, ambient({'ambient.istio.io/bypass-inbound-capture': 'true'}), inboundOf, undefined);
test('bypass-inbound-capture keeps the source', read, ambient({'ambient.istio.io/bypass-inbound-capture': 'true'}), capture => capture.keepSource, true);
test('bypass-inbound-capture=false captures', read, ambient({'ambient.istio.io/bypass-inbound-capture': 'false'}), capture => capture.inbound?.port, 15_006);
test('the node\'s default without DNS', read, ambient({}, {ambientDns: false}), dnsOf, undefined);
test('dns-capture=false against the node\'s default', read, ambient({'ambient.istio.io/dns-capture': 'false'}), dnsOf, undefined);
test('dns-capture=true against the node\'s default', read, ambient({'ambient.istio.io/dns-capture': 'true'}, {ambientDns: false}), dnsOf, {port: 15_053});
for (const text of ['1', 't', 'T', 'TRUE', 'True']) {
	test(`a boolean that is ${text}`, read, ambient({'ambient.istio.io/dns-capture': text}, {ambientDns: false}), dnsOf, {port: 15_053});
}

for (const text of ['0', 'f', 'F', 'FALSE', 'False', ' false ']) {
	test(`a boolean that is '${text}'`, read, ambient({'ambient.istio.io/dns-capture': text}), dnsOf, undefined);
}

test('no interface to reroute', read, ambient({'istio.io/reroute-virtual-interfaces': ''}), inboundOf, {port: 15_006, includePorts: '*', excludePorts: [15_008], passNode: true});
test('REDIRECT', read, sidecar({'sidecar.istio.io/interceptionMode': 'REDIRECT'}), includeRanges, '*');
test('all ranges', read, sidecar({[`${TRAFFIC}includeOutboundIPRanges`]: '*'}), includeRanges, '*');
test('no range, which is not the same as no annotation', read, sidecar({[`${TRAFFIC}includeOutboundIPRanges`]: ''}), includeRanges, []);
test('ranges lose host bits and doubles, and are written in one way', read, sidecar({[`${TRAFFIC}includeOutboundIPRanges`]: '10.1.2.3/8,10.0.0.0/8, FD80:0::FF/9 ,192.168.1.77/31,10.0.0.1/32'}), includeRanges, [
	{address: '10.0.0.0', bits: 8}, {address: 'fd80::', bits: 9}, {address: '192.168.1.76', bits: 31}, {address: '10.0.0.1', bits: 32},
]);
test('the widest ranges', read, sidecar({[`${TRAFFIC}includeOutboundIPRanges`]: '0.0.0.0/0,::/0,1.2.3.4/0'}), includeRanges, [{address: '0.0.0.0', bits: 0}, {address: '', bits: 0}]);
test('loopback ranges', read, sidecar({[`${TRAFFIC}includeOutboundIPRanges`]: '127.0.0.1/8,127.0.0.6/32,::1/128'}), includeRanges, [{address: '127.0.0.0', bits: 8}, {address: '127.0.0.6', bits: 32}, {address: '::1', bits: 128}]);
test('ranges to exclude', read, sidecar({[`${TRAFFIC}excludeOutboundIPRanges`]: '10.96.0.0/12'}), excludeRanges, [{address: '10.96.0.0', bits: 12}]);
test('no range to exclude', read, sidecar({[`${TRAFFIC}excludeOutboundIPRanges`]: ' '}), excludeRanges, []);
test('ports to exclude', read, sidecar({[`${TRAFFIC}excludeOutboundPorts`]: ' 80,443, 80,65535'}), excludePorts, [80, 443, 65_535]);
test('ports to include', read, sidecar({[`${TRAFFIC}includeOutboundPorts`]: '1'}), includePorts, [1]);
test('no port to include', read, sidecar({[`${TRAFFIC}includeOutboundPorts`]: ''}), includePorts, []);
test('inbound ports to exclude come on top of the sidecar\'s own', read, sidecar({[`${TRAFFIC}excludeInboundPorts`]: '8080,15021'}), inboundOf,
	{port: 15_006, includePorts: '*', excludePorts: [15_008, 15_020, 15_021, 15_090, 8080], passNode: false});
test('a list of inbound ports', read, sidecar({[`${TRAFFIC}includeInboundPorts`]: '8080,15020', [`${TRAFFIC}excludeInboundPorts`]: '8080'}), inboundOf,
	{port: 15_006, includePorts: [8080, 15_020], excludePorts: [15_008], passNode: false});
test('no inbound port', read, sidecar({[`${TRAFFIC}includeInboundPorts`]: ''}), inboundOf, undefined);
test('interfaces to exclude', read, sidecar({[`${TRAFFIC}excludeInterfaces`]: 'net1, eth1.100,net1'}), capture => capture.excludeInterfaces, ['net1', 'eth1.100']);
test('no interface to exclude', read, sidecar({[`${TRAFFIC}excludeInterfaces`]: ''}), capture => capture.excludeInterfaces, []);
test('no KubeVirt interface, as Istio\'s template writes it', read, sidecar({[`${TRAFFIC}kubevirtInterfaces`]: ''}), includeRanges, '*');
test('the node\'s default for a sidecar\'s DNS', read, sidecar({}, {sidecarDns: true}), dnsOf, {port: 15_053});
for (const [config, expected] of [
	['proxyMetadata: {ISTIO_META_DNS_CAPTURE: "true"}', true], ['{"proxyMetadata":{"ISTIO_META_DNS_CAPTURE":"false"}}', false], ['proxyMetadata:\n  ISTIO_META_DNS_CAPTURE: true\n', true],
] as const) {
	test(`${config} against the node's default`, read, sidecar({'proxy.istio.io/config': config}, {sidecarDns: !expected}), dnsOf, expected ? {port: 15_053} : undefined);
}

for (const config of ['', '{}', 'proxyMetadata:', 'concurrency: 2', 'proxyMetadata: {OTHER: "x"}']) {
	test(`'${config}' says nothing of DNS`, read, sidecar({'proxy.istio.io/config': config}, {sidecarDns: true}), dnsOf, {port: 15_053});
}

test('thousands of ranges and ports are read', t => {
	const ports = Array.from({length: 65_535}, (_, index) => index + 1);
	const ranges = Array.from({length: 20_000}, (_, index) => `10.${index >> 8}.${index & 255}.0/24`);
	const {outbound} = sidecar({[`${TRAFFIC}excludeOutboundPorts`]: ports.join(','), [`${TRAFFIC}excludeOutboundIPRanges`]: ranges.join(',')});
	t.deepEqual(outbound.excludePorts, ports);
	t.deepEqual(outbound.excludeRanges.map(({address, bits}) => `${address}/${bits}`), ranges);
});

/* What is refused. */

const refused = test.macro({
	exec(t, make: () => unknown, message: string | RegExp) {
		t.throws(make, {instanceOf: InputError, message});
	},
	title: (title = '') => `refused: ${title}`,
});
const badSidecar = (name: string, text: string) => () => sidecar({[name]: text});
const badAmbient = (name: string, text: string) => () => ambient({[name]: text});

for (const [text, why] of [
	['10.0.0.1', 'is not a range such as 10.0.0.0/8 or fd00::/8'], ['10.0.0.0/33', 'is not a range such as'], ['fd00::/129', 'is not a range such as'], ['10.0.0.0/', 'is not a range such as'],
	['/8', 'is not a range such as'], ['10.0.0/8', 'is not a range such as'], ['010.0.0.0/8', 'is not a range such as'], ['10.0.0.0/08', 'is not a range such as'], ['10.0.0.0/+8', 'is not a range such as'],
	['10.0.0.0/-1', 'is not a range such as'], ['10.0.0.0/8/8', 'is not a range such as'], ['10.0.0.0 /8', 'is not a range such as'], ['fe80::1%eth0/64', 'is not a range such as'], ['kubernetes.default/8', 'is not a range such as'],
	['::ffff:10.0.0.0/104', 'is an IPv4 range in IPv6 form, which no connection matches: write it as IPv4'],
	['127.0.0.1/4', 'is a loopback address with a range that goes beyond loopback: write 112.0.0.0/4, and loopback as a range of its own'],
	['::1/64', 'is a loopback address with a range that goes beyond loopback: write ::/64, and loopback as a range of its own'],
] as const) {
	test(`the range ${text}`, refused, badSidecar(`${TRAFFIC}includeOutboundIPRanges`, text), new RegExp(`^pod shop/web: annotation ${TRAFFIC}includeOutboundIPRanges: "${text.replaceAll(/[+./]/g, '\\$&')}" ${why}`));
}

test('a wildcard to exclude', refused, badSidecar(`${TRAFFIC}excludeOutboundIPRanges`, '*'), `pod shop/web: annotation ${TRAFFIC}excludeOutboundIPRanges: "*" is not a range such as 10.0.0.0/8 or fd00::/8`);
test('a wildcard among ranges', refused, badSidecar(`${TRAFFIC}includeOutboundIPRanges`, '*,10.0.0.0/8'), /includeOutboundIPRanges: "\*" is not a range/);
test('a comma at the end', refused, badSidecar(`${TRAFFIC}includeOutboundIPRanges`, '10.0.0.0/8,'), /includeOutboundIPRanges: "" is not a range/);
for (const text of ['0', '65536', '-1', '+80', '080', '80.0', '0x50', '8000-9000', '8000:9000', 'http', '*', '9'.repeat(400)]) {
	test(`the port ${text.slice(0, 10)}`, refused, badSidecar(`${TRAFFIC}excludeOutboundPorts`, text), `pod shop/web: annotation ${TRAFFIC}excludeOutboundPorts: "${text.length > 100 ? `${text.slice(0, 100)}…` : text}" is not a port from 1 to 65535`);
}

test('an empty port', refused, badSidecar(`${TRAFFIC}includeInboundPorts`, '80,,81'), `pod shop/web: annotation ${TRAFFIC}includeInboundPorts: "" is not a port from 1 to 65535`);
test('inbound: a wildcard among ports', refused, badSidecar(`${TRAFFIC}includeInboundPorts`, '80,*'), /includeInboundPorts: "\*" is not a port/);
test('inbound: a wildcard to exclude', refused, badSidecar(`${TRAFFIC}excludeInboundPorts`, '*'), /excludeInboundPorts: "\*" is not a port/);
test('outbound: a wildcard of ports', refused, badSidecar(`${TRAFFIC}includeOutboundPorts`, '*'), /includeOutboundPorts: "\*" is not a port/);
for (const text of ['eth 0', 'a'.repeat(16), '-eth0', 'eth+', 'eth0,', '../x']) {
	test(`the interface ${text}`, refused, badSidecar(`${TRAFFIC}excludeInterfaces`, text), new RegExp(`^pod shop/web: annotation ${TRAFFIC}excludeInterfaces: ".*" is not the name of an interface`));
}

test('TPROXY', refused, badSidecar('sidecar.istio.io/interceptionMode', 'TPROXY'), /^pod shop\/web: annotation sidecar\.istio\.io\/interceptionMode: got "TPROXY", .* only REDIRECT is supported$/);
test('NONE for a pod whose mode is given', refused, badSidecar('sidecar.istio.io/interceptionMode', 'NONE'), /interceptionMode: got "NONE", which asks for no capture/);
test('another mode', refused, badSidecar('sidecar.istio.io/interceptionMode', 'redirect'), 'pod shop/web: annotation sidecar.istio.io/interceptionMode: expected REDIRECT or NONE, got "redirect"');
for (const [make, name] of [[badSidecar, `${TRAFFIC}kubevirtInterfaces`], [badSidecar, 'istio.io/reroute-virtual-interfaces'], [badAmbient, 'istio.io/reroute-virtual-interfaces']] as const) {
	test(`${make === badAmbient ? 'ambient' : 'sidecar'}: ${name}`, refused, make(name, 'net1'), new RegExp(`^pod shop/web: annotation ${name}: got "net1": traffic that the pod forwards .* not supported$`));
}

for (const text of ['', 'yes', 'tRUE', 'enabled']) {
	test(`a boolean that is '${text}'`, refused, badAmbient('ambient.istio.io/dns-capture', text), `pod shop/web: annotation ambient.istio.io/dns-capture: expected true or false, got "${text}"`);
}

test('another boolean', refused, badAmbient('ambient.istio.io/bypass-inbound-capture', 'x'), 'pod shop/web: annotation ambient.istio.io/bypass-inbound-capture: expected true or false, got "x"');
for (const [config, problem] of [
	['a: b: c', 'expected YAML, got "a: b: c" (Nested mappings are not allowed in compact mappings)'], ['a: 1\na: 2', 'expected YAML, got "a: 1\\na: 2" (Map keys must be unique)'],
	['text', 'expected a mapping that may have proxyMetadata, got "text"'], ['[]', 'expected a mapping that may have proxyMetadata, got "[]"'],
	['proxyMetadata: []', 'expected a mapping that may have ISTIO_META_DNS_CAPTURE, got "proxyMetadata: []"'],
	['proxyMetadata: {ISTIO_META_DNS_CAPTURE: yes}', 'proxyMetadata.ISTIO_META_DNS_CAPTURE: expected true or false, got "yes"'],
	['proxyMetadata: {ISTIO_META_DNS_CAPTURE: ""}', 'proxyMetadata.ISTIO_META_DNS_CAPTURE: expected true or false, got ""'],
] as const) {
	test(`a proxy config that is '${config}'`, refused, badSidecar('proxy.istio.io/config', config), `pod shop/web: annotation proxy.istio.io/config: ${problem}`);
}

test('a slip in a name', refused, badSidecar(`${TRAFFIC}excludeOutboundPort`, '80'), `pod shop/web: annotation ${TRAFFIC}excludeOutboundPort: with value "80" is not known: did you mean ${TRAFFIC}excludeOutboundPorts?`);
test('a name in another case', refused, badSidecar(`${TRAFFIC}includeOutboundIpRanges`, ''), /did you mean traffic\.sidecar\.istio\.io\/includeOutboundIPRanges\?/);
test('a slip in a name, ambient', refused, badAmbient('ambient.istio.io/dns-captures', 'true'), /did you mean ambient\.istio\.io\/dns-capture\?/);
test('a slip in a name of the other mode is only told', enrolled, {labels: AMBIENT, annotations: {[`${TRAFFIC}excludeOutboundPort`]: '80'}}, 'ambient', [`annotation ${TRAFFIC}excludeOutboundPort has no effect in ambient mode`]);

test('where a single problem is, is the annotation', t => {
	const error = t.throws(badSidecar(`${TRAFFIC}excludeOutboundPorts`, 'x'), {instanceOf: InputError})!;
	t.is(error.where, `pod shop/web: annotation ${TRAFFIC}excludeOutboundPorts`);
	t.is(error.problem, '"x" is not a port from 1 to 65535');
});

test('every problem of a pod is told at once', t => {
	const error = t.throws(() => decideEnrolment(pod({
		annotations: {...SIDECAR, [`${TRAFFIC}includeOutboundIPRanges`]: '10.0.0.1,::1/64', [`${TRAFFIC}excludeInboundPorts`]: '1,2,a,b,c,d,e,f,g', [`${TRAFFIC}excludeInterface`]: 'x'},
	}), ISTIO_DEFAULTS), {instanceOf: InputError})!;
	t.is(error.where, 'pod shop/web');
	t.deepEqual(error.problem.split('; '), [
		`annotation ${TRAFFIC}excludeInterface: with value "x" is not known: did you mean ${TRAFFIC}excludeInterfaces?`,
		`annotation ${TRAFFIC}includeOutboundIPRanges: "10.0.0.1" is not a range such as 10.0.0.0/8 or fd00::/8, "::1/64" is a loopback address with a range that goes beyond loopback: write ::/64, and loopback as a range of its own`,
		`annotation ${TRAFFIC}excludeInboundPorts: ${['a', 'b', 'c', 'd', 'e'].map(port => `"${port}" is not a port from 1 to 65535`).join(', ')}, and 2 more`,
	]);
});
