{{- define "swarmpull.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* labels of a role: (dict "root" $ "role" "agent") */}}
{{- define "swarmpull.selector" -}}
app.kubernetes.io/name: swarmpull
app.kubernetes.io/instance: {{ include "swarmpull.name" .root }}
app.kubernetes.io/component: {{ .role }}
{{- end -}}

{{/* host:port of each pod of a role, quoted: names stay when pods are replaced, addresses do not */}}
{{- define "swarmpull.members" -}}
{{- $name := printf "%s-%s" (include "swarmpull.name" .root) .role -}}
{{- $members := list -}}
{{- range $number := until (int .replicas) -}}
{{- $members = append $members (printf "\"%s-%d.%s.%s.svc.%s:%d\"" $name $number $name $.root.Release.Namespace $.root.Values.clusterDomain (int $.port)) -}}
{{- end -}}
[{{ join ", " $members }}]
{{- end -}}

{{- define "swarmpull.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- define "swarmpull.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "swarmpull.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* environment of a role: (dict "root" $ "role" "agent") */}}
{{- define "swarmpull.tlsEnvironment" -}}
{{- if .root.Values.tls.enabled }}
- name: SWARMPULL_TLS__CA
  value: /etc/swarmpull-tls/ca.crt
- name: SWARMPULL_TLS__CERT
  value: /etc/swarmpull-tls/tls.crt
- name: SWARMPULL_TLS__KEY
  value: /etc/swarmpull-tls/tls.key
{{- if .root.Values.tls.crl }}
- name: SWARMPULL_TLS__CRL
  value: /etc/swarmpull-tls/ca.crl
{{- end }}
{{- end }}
{{- end -}}

{{/* (dict "root" $ "role" "agent"), with "passwords" where a Secret has some */}}
{{- define "swarmpull.mounts" -}}
- name: config
  mountPath: /etc/swarmpull
  readOnly: true
- name: data
  mountPath: /var/lib/swarmpull
- name: tmp
  mountPath: /tmp
{{- if .root.Values.tls.enabled }}
- name: tls
  mountPath: /etc/swarmpull-tls
  readOnly: true
{{- end }}
{{- if .passwords }}
- name: passwords
  mountPath: /etc/swarmpull-passwords
  readOnly: true
{{- end }}
{{- end -}}

{{- define "swarmpull.volumes" -}}
- name: config
  configMap:
    name: {{ include "swarmpull.name" .root }}
- name: tmp
  emptyDir:
    sizeLimit: 64Mi
{{- if .root.Values.tls.enabled }}
- name: tls
  secret:
    secretName: {{ .root.Values.tls.secretPrefix }}-{{ .role }}
    defaultMode: 0440
{{- end }}
{{- with .passwords }}
- name: passwords
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- end -}}

{{/* probes of an admin listener: (dict "port" 7530), with "host" where it is on the host's loopback, and with
"delay" where others have to find a new pod before the next one is replaced */}}
{{- define "swarmpull.probes" -}}
# Opening a large store and the first look at a backend may take minutes.
startupProbe:
  httpGet:
    path: /health
    port: {{ .port }}
    {{- with .host }}
    host: {{ . }}
    {{- end }}
  periodSeconds: 2
  failureThreshold: 150
livenessProbe:
  httpGet:
    path: /health
    port: {{ .port }}
    {{- with .host }}
    host: {{ . }}
    {{- end }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  httpGet:
    path: /readiness
    port: {{ .port }}
    {{- with .host }}
    host: {{ . }}
    {{- end }}
  {{- with .delay }}
  # Longer than others may believe in the address of the pod before.
  initialDelaySeconds: {{ . }}
  {{- end }}
  periodSeconds: 5
  timeoutSeconds: 5
{{- end -}}

{{/* pods of one role on different hosts, where that is possible */}}
{{- define "swarmpull.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "swarmpull.selector" . | nindent 8 }}
{{- end -}}

{{/* what all pods have in common */}}
{{- define "swarmpull.podSpec" -}}
automountServiceAccountToken: false
# Variables for every Service of the namespace would be taken for configuration.
enableServiceLinks: false
# More than drain_timeout, 10 s, and what cutting it short takes.
terminationGracePeriodSeconds: 30
securityContext:
  {{- include "swarmpull.podSecurity" . | nindent 2 }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "swarmpull.command" -}}
image: {{ include "swarmpull.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
args: [run, --role, {{ .role }}, --config, /etc/swarmpull/swarmpull.toml, --data-dir, /var/lib/swarmpull]
{{- end -}}
